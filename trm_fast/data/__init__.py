"""Data of the recipes: generators, readers and splits."""
