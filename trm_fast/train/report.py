"""What a run has been: a table, curves and one page, from what it wrote."""

FILES = ("report.html", "curves.png")
