"""Where the time of a compilation goes, and a line that tells while it lasts."""
