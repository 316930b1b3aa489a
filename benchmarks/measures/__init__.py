"""What `speed.py` measures: texts, models, the yardstick, and one function for each table."""
