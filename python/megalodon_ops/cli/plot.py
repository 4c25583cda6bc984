"""`plot`: draw the metrics of a run, or of several to compare."""

from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.options import CURVE, METRICS, Plot
from megalodon_ops.training import draw_metrics, read_metrics


def run(options: Plot) -> int:
    runs = {str(folder): read_metrics(folder / METRICS) for folder in options.runs}
    for folder, rows in runs.items():
        if not rows:
            raise CommandError(f"{folder}: no step in {METRICS}; name the folder of a run of `train`")
    if options.out is None and len(runs) > 1:
        raise CommandError("--out: must name the picture of several runs, such as runs.png")
    out = options.out or options.runs[0] / CURVE
    if len(runs) > 1:
        draw_metrics(out, runs, by=options.by)
    else:
        (rows,) = runs.values()
        compressors = next((row["compressors"] for row in rows if row.get("final")), None)
        draw_metrics(out, rows, compressors, by=options.by)
    print(out)
    return 0
