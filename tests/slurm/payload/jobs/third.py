"""Test payload: stage 3 of 3."""

from jobs._stage import Stage, StageConfig
from tribunal.cluster.launch import main


class Config(StageConfig):
    pass


class Third(Stage):
    name = "third"
    needs = ("second",)


if __name__ == "__main__":
    main("third")
