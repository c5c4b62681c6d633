"""The rooms as Prefect tasks: retries and names, nothing else. The store is the cache, so Prefect's stays off."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from vila_ops import pipeline
from vila_ops.data.prepare import prepare
from vila_ops.eval.evaluate import evaluate
from vila_ops.model.assemble import assemble
from vila_ops.registry.register import register
from vila_ops.serve.deploy import deploy
from vila_ops.train.stage import train_stage

# Only what a second try can mend is tried again; a wrong setting fails in the flow's first second (Run is validated).
ROOMS = pipeline.Rooms(
    assemble=task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5)(assemble),
    prepare=task(
        task_run_name="prepare {mixture.name}", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5
    )(prepare),
    train_stage=task(
        task_run_name="train {stage.name}", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10
    )(train_stage),
    evaluate=task(
        task_run_name="evaluate on {suite.name}", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5
    )(evaluate),
    register=task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=2)(register),
    deploy=task(cache_policy=NO_CACHE, retries=1, retry_delay_seconds=5)(deploy),
)  # fmt: skip
