"""Search over trials, each of them a plan run by the trainer."""
