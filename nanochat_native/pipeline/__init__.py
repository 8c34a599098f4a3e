"""The stages of a speedrun: recipes, the processes that run them, the state of a folder, estimates, the report card.

It may depend on `ops`, `runtime`, `model`, `optim`, `data`, `runs`, `inference`, `evaluation` and `training`. The
commands of the stages run as processes of their own.
"""
