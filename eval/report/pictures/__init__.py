"""The report's pictures: matplotlib figures, drawn into the page and into files."""
