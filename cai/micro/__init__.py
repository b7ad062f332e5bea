"""The embedded default: a small world whose truth is known, and a small model that was trained on it.

`world` makes requests of `topics` and `phrases`, `conversations` puts them into conversations, `answers` writes answers
to them, `world_principles` says which answer is better under which principle, `world_injections` what an answer may say
to its judge, and `oracle` reads all of it back from text. `cai.micro_model` trains and measures the model. The world is
an instrument: its judge was trained on it, so it shows how the machinery behaves and never that critique helps in
general.
"""
