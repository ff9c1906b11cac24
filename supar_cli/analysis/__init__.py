"""What trained plans show: studies of transfer, checks and their figures."""
