"""What people and Prometheus see of running work: the tasks of a store, its models and its decisions."""
