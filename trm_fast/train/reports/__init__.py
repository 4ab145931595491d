"""Reports: what the directory of a run says, as tables, curves and a page."""
