"""The report: the page of one run as a single HTML file, without personal paths, to keep or to attach to an issue."""
