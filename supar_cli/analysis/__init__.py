"""What trained plans show: sweeps over the learning rate and their figures."""
