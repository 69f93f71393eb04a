from helpers.training import *  # noqa: F403 - its fixtures
