# Everything a fresh machine needs is made from here; see README.md.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Extra papermill parameters, such as PARAMETERS="-p seeds 0,1,2"
PARAMETERS ?=
JOBS   ?= 2

.PHONY: help install distill test export readme lab clean

help:            ## list the commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: requirements.lock setup.py settings.ini
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

install: $(VENV)/installed  ## make the virtual environment from the lock file

distill: install  ## the main job: teacher and students on the embedded data set; leaves outputs/synthbirds.{ipynb,html}
	mkdir -p outputs
	$(BIN)/papermill nbs/distill.ipynb outputs/synthbirds.ipynb -p dataset synthbirds $(PARAMETERS)
	$(BIN)/jupyter nbconvert --log-level WARN --to html outputs/synthbirds.ipynb

test: install  ## run every notebook and the tests
	$(BIN)/python -m pytest tests --numprocesses $(JOBS) --durations 12 --quiet

export: install  ## notebooks to package, from nothing
	rm -rf ctrlscam
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: install  ## README.md from nbs/index.ipynb, data/README.md from data/sources.json
	$(BIN)/jupyter nbconvert --log-level WARN --execute --to markdown --no-input --output-dir . --output README nbs/index.ipynb
	sed -i -E 's#\]\(([0-9a-z_]+\.ipynb)\)#](nbs/\1)#g; s#\]\(\.\./#](#g' README.md
	$(BIN)/python -c 'from ctrlscam.download import readme_text; print(readme_text(), end="")' > data/README.md.new
	mv data/README.md.new data/README.md

lab: install  ## step through the notebooks
	$(BIN)/jupyter lab nbs

clean:           ## remove the environment and generated package folders; data and outputs stay
	rm -rf $(VENV) build dist *.egg-info
