"""How a sparse linear is stored and computed. Models, optimizer and checkpoints don't know which engine runs."""
