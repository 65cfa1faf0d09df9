"""report.html: a page of sections, made from the files of a run alone."""
