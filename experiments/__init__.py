"""What is made with the method: `python -m experiments.NAME`. Nothing outside imports it."""
