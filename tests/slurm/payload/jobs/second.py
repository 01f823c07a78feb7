"""Test payload: stage 2 of 3."""

from jobs._stage import Stage, StageConfig
from tribunal.cluster.launch import main


class Config(StageConfig):
    pass


class Second(Stage):
    name = "second"
    needs = ("first",)


if __name__ == "__main__":
    main("second")
