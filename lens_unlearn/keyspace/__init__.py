"""The geometry of keys: regions that hold the queries of a skill, and how well they tell skills apart.

Knows tensors of keys, and in `key_space` how to collect them; knows nothing of interventions. The room cannot be called
`key_space`: the public function of that name, `lens_unlearn.key_space`, would be hidden by it.
"""
