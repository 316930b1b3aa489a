"""Fine-tuning: tasks, their metrics, runs that resume, and tables of many runs."""
