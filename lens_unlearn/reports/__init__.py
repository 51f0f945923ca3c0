"""Reports as HTML: one file that opens offline, with findings in words, figures, texts and tables.

Knows reports and figures; knows nothing of models.
"""
