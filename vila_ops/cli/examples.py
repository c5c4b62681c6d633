"""An example of each command, which its --help ends with. Each fits a line of 80 columns."""

import inspect

import typer

EXAMPLES = {
    "": "show demo",
    "init": "init mine --data mine/captions.csv --images mine/images",
    "show": "show vila-7b -r vila_128 -s stages.sft.learning_rate=1e-5",
    "explain": "explain tiny -s stages.sft.learning_rate=1e-4",
    "plan": "plan vila-7b -r vila_128 --lengths vila",
    "fetch": "fetch demo --dry-run",
    "prepare": "prepare demo --mixture align",
    "import": "import VILA1.5-3b --out models/vila15-3b",
    "evaluate": "evaluate demo --stage sft --final",
    "compare": "compare store/report/BEFORE store/report/AFTER --slices",
    "alignment": "alignment demo --out alignment.svg",
    "register": "register demo -r laptop",
    "champion": "champion vila-demo -r laptop --back --reason rude",
    "deploy": "deploy demo -r laptop",
    "undeploy": "undeploy demo -r laptop",
    "canary": "canary demo -r laptop --version 2 --share 0.1",
    "promote": "promote demo -r laptop",
    "rollback": "rollback demo -r laptop",
    "run": "run tiny --dry-run",
    "retrain": "retrain demo --policy demo -r laptop --dry-run",
    "ablate": "ablate tiny --dry-run",
    "export": "export store/checkpoint/ADDRESS --out model --check vllm",
    "generate": "generate model --image photo.png 'What is this?'",
    "verify": "verify store/checkpoint/ADDRESS",
    "trace": "trace vila-demo@champion -r laptop",
    "report": "report demo -r laptop",
    "top": "top -r laptop --once",
    "metrics": "metrics -r laptop --listen 127.0.0.1:9464",
    "gc": "gc -r laptop --keep demo",
    "backup": "backup /backups/vila -r laptop",
    "restore": "restore /backups/vila -r laptop",
    "doctor": "doctor -r laptop",
    "up": "up --servers configs/local.yaml",
    "down": "down --servers configs/local.yaml",
    "status": "status --json",
    "logs": "logs worker --follow",
    "sweep": "sweep --prefect http://127.0.0.1:4200/api --once",
    "demo": "demo demo -r laptop",
    "data": "data lint mine/captions.csv --images mine/images",
    "data lint": "data lint mine/captions.csv --images mine/images",
    "data show": "data show demo --mixture align --out samples.html",
    "data download": "data download coyo raw/coyo --out raw/coyo_images",
    "data watch": "data watch configs/recipes/mine.yaml --mixture mine --commit",
    "data quarantine": "data quarantine mine --mixture mine --sample KEY",
    "data remove": "data remove mine --mixture mine --id 0001.jpg",
    "train": "train demo --stage align",
    "train stage": "train demo --stage align --dry-run",
    "train verify-resume": "train verify-resume tiny --kills 5",
    "benchmark": "benchmark list",
    "benchmark list": "benchmark list --json",
    "benchmark check": "benchmark check data/benchmarks --only gqa",
    "benchmark get": "benchmark get mmmu --out data/benchmarks",
    "keys": "keys list keys.json",
    "keys create": "keys create keys.json Ann --days 90 --max-concurrent 4",
    "keys list": "keys list keys.json --json",
    "keys revoke": "keys revoke keys.json ID",
    "keys rotate": "keys rotate keys.json ID --grace-hours 24",
    "keys audit": "keys audit keys.json.audit.jsonl",
}
"""The words after `vila-ops`, by the name of the command; "" is the program itself."""


def epilog(command: str) -> str:
    """The last paragraph of a command's help."""
    return f"Example: vila-ops {EXAMPLES[command]}"


def complete_help(app: typer.Typer, group: str = "") -> None:
    """Give each command its example, and its docstring as paragraphs that fit any terminal."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        command.epilog = epilog(f"{group} {name}".strip())
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(one.split()) for one in paragraphs)
    for subgroup in app.registered_groups:
        assert subgroup.typer_instance is not None
        name = str(subgroup.typer_instance.info.name)
        subgroup.typer_instance.info.epilog = epilog(name)
        complete_help(subgroup.typer_instance, name)
