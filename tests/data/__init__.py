"""The data: sources, partition, tasks."""
