"""Public training programs, each with its step moved into a function: `python -m bench.programs`."""
