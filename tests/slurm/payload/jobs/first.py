"""Test payload: stage 1 of 3."""

from jobs._stage import Stage, StageConfig
from tribunal.cluster.launch import main


class Config(StageConfig):
    pass


class First(Stage):
    name = "first"


if __name__ == "__main__":
    main("first")
