"""How figures are shown: a comparison as a page, a picture and a terminal table; labels and training as pictures.

`figures` computes a comparison's figures from its rows, `figure_types` and `summary` define the JSON files that hold
them; all other modules only show them. Jinja, matplotlib and rich are imported only where they are used.
"""
