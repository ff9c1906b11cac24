"""Model families. Each builds from the plan's model section alone."""
