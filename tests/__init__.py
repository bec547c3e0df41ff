# A package, for torch-fidelity installs one of this name: without this file its would be the one that is imported.
