"""Reads everything from `settings.ini`, the one place where the project is configured."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
config = parser["DEFAULT"]

setup(
    name=config["lib_name"],
    version=config["version"],
    description=config["description"],
    keywords=config["keywords"],
    author=config["author"],
    author_email=config["author_email"],
    license="Apache-2.0",
    url=config["git_url"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=[config["lib_name"]],
    python_requires=f">={config['min_python']}",
    install_requires=config["requirements"].split(),
    extras_require={extra: config[f"{extra}_requirements"].split() for extra in ("dev", "watch")},
    data_files=[("share/ctrlscam", ["data/sources.json"])],
    entry_points={
        "nbdev": [f"{config['lib_name']}={config['lib_name']}._modidx:d"],
        "console_scripts": ["ctrlscam=ctrlscam.cli:main"],
    },
    zip_safe=False,
)
