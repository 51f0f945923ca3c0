"""Reports as HTML: one file that opens offline, with findings in words, figures, texts and tables.

Python here computes what is said; `templates/` (Jinja2, which escapes whatever comes from data) decides how it is written.
Knows reports and figures; knows nothing of models.
"""
