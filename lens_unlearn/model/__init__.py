"""A language model as the rest of the package sees it: sites, hooks, weight matrices, positions of text, loading.

Knows TransformerLens and Hugging Face model classes, and is the only room that does; knows nothing of corpora, statistics or
interventions.
"""
