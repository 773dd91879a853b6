"""The data of clients: tables, partitions, tasks, and the grading of answers."""
