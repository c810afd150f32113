"""Comparing runs: what they left behind, grouped by setting, as one page, pictures and numbers for programs."""
