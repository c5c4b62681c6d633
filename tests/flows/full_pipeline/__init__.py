"""Two stages of the tiny recipe through Prefect, Ray, DeepSpeed, MLflow and Serve, by the command of `make demo`.

The servers start slowly, so these files share one set and one first run: the fixtures of `conftest.py` live as long as
this package, which one worker of pytest-xdist runs as a whole.
"""
