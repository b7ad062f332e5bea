"""How figures are shown: a comparison as a page, a picture and a terminal table; labels and training as pictures.

`figures` computes a comparison's figures from its rows. `figure_types` defines comparison.json, `summary.schema.json`
defines summary.json. All other modules only show figures. Jinja, matplotlib and rich are imported only where they are
used.
"""
