"""What pyproject.toml cannot say: packages are found, and two folders outside peftlib/ are added to them."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["peftlib*"]), "peftlib.notebooks", "peftlib.results.bench"])
