"""The methods: (model, forget, retain, *, options) -> intervention."""
