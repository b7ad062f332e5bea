"""The embedded default: a small world whose truth is known, and a small model that was trained on it.

`world` makes requests from `topics` and `phrases`, `conversations` what they stand in, `answers` the ways to answer
them; `principles` says what is better under which principle, `wordings` how that is asked; `oracle` reads all of it
back from text. `tasks` makes questions and right answers of it, `corpus` what the model is trained on, `pretrain`
trains it, `evaluate` measures it. It is an instrument: its judge was trained on this world, so it shows how the
machinery behaves and never that critique helps in general.
"""
