# With it, tools that import conftest.py without --import-mode=importlib find its neighbours.
