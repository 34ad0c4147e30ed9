"""Train the small models of the papers on real images, save them, load one again, and draw what it sees."""

# torch, timm and matplotlib are imported in main(), after the arguments: --help needs no installation and no patience
import argparse
import csv
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from _cli import UserError, run

MODELS = ('small_cnn', 'small_secnn', 'small_saecnn', 'cifar_senetv2_resnet20')
RESULTS = 'results.csv'  # marks a folder as one of this script's
PICTURE = 'quickstart.png'
COLUMNS = ('model', 'parameters', 'test loss', 'test accuracy', 'seconds')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__ + ' Takes a few minutes on two CPU cores; uses a GPU where there is one. Writes a '
        'folder a model (model.safetensors and config.json, which timm loads as local-dir:FOLDER), '
        f'{RESULTS} (a row an epoch) and {PICTURE}. They replace those of the last run when all is done, not before.',
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=list(MODELS),
        metavar='MODEL',
        help=f'names from timm.list_models(), trained from scratch (default: {" ".join(MODELS)})',
    )
    parser.add_argument('--epochs', type=int, default=10, metavar='N', help='passes over the images (default: 10)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='each model starts from it (default: 0)')
    parser.add_argument(
        '--dataset',
        default='digits',
        metavar='NAME',
        help='digits (1,797 handwritten ones that come with scikit-learn, a quarter held out), fashion-mnist, cifar10, '
        'cifar100, or the path of an image folder: train/ and val/ with a folder for each class in them, or the '
        "classes' folders alone, of which a quarter is held out (default: digits)",
    )
    parser.add_argument(
        '--data-dir',
        metavar='DIR',
        help="where fashion-mnist, cifar10 or cifar100 is or shall be downloaded to (default: in the user's cache)",
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path(__file__).resolve().parents[1] / 'output' / 'quickstart',
        metavar='DIR',
        help='folder to write: a new one, or one that this script wrote (default: output/quickstart in the clone)',
    )
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise UserError(f'--epochs must be at least 1, got {args.epochs}')
    if not 0 <= args.seed < 2**32:
        raise UserError(f'--seed must lie in 0 to {2**32 - 1}, got {args.seed}')
    args.models = list(dict.fromkeys(args.models))
    return args


@contextmanager
def replaced_when_done(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place at the end, or vanishes if the end is not reached."""
    out = out.resolve()
    unfinished, previous = out.with_name(f'{out.name}.unfinished'), out.with_name(f'{out.name}.previous')
    if out.exists() and not (out.is_dir() and ((out / RESULTS).is_file() or not any(out.iterdir()))):
        raise UserError(f'{out} holds something else; choose another --out')
    try:
        if previous.exists() and not out.exists():
            previous.rename(out)  # of a run that was killed between the two renames below
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir(parents=True)
    except OSError as e:
        raise UserError(f'cannot write to {out.parent}: {e.strerror}; choose another --out') from None
    try:
        yield unfinished
        shutil.rmtree(previous, ignore_errors=True)
        if out.exists():
            out.rename(previous)
        unfinished.rename(out)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_results(path: Path, fits: Sequence) -> None:
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('model', 'parameters', 'epoch', 'train_loss', 'test_loss', 'test_accuracy'))
        for f in fits:
            for epoch, row in enumerate(zip(f.train_loss, f.test_loss, f.test_accuracy, strict=True), start=1):
                writer.writerow((f.name, f.parameters, epoch, *(f'{value:.6g}' for value in row)))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    for row in (COLUMNS, ['-' * w for w in widths], *rows):
        print('  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))


def advance(bar, state) -> None:
    if state.test_accuracy:
        bar.set_postfix_str(f'held out {state.test_accuracy[-1]:.1f} %', refresh=False)
    bar.update()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    import timm
    import torch
    from _data import load_dataset
    from _fit import fit, predict, save, updates
    from _picture import draw, pick
    from tqdm import tqdm

    import timm_senetv2  # noqa: F401  the models are there even with torch's autoload off

    for name in args.models:
        if not timm.is_model(name):
            close = get_close_matches(name, timm.list_models(), n=3)
            raise UserError(
                f'unknown model {name!r}; '
                + (f'did you mean {" or ".join(close)}?' if close else 'timm.list_models() has all names')
            )
    data = load_dataset(args.dataset, args.data_dir)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        # On all cores, each step of these small models would wait for the one core that something else runs on
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    shown = MODELS[-1] if MODELS[-1] in args.models else args.models[-1]

    print(
        f'{data.name}: {len(data.train)} images to train on, {len(data.test)} held out, {len(data.classes)} classes; '
        f'epochs: {args.epochs}, on {device}'
    )
    with replaced_when_done(args.out) as folder:
        fits = []
        for name in args.models:
            with tqdm(total=updates(data, args.epochs), desc=name, unit='batch', leave=False, disable=None) as bar:
                fits.append(fit(name, data, args.epochs, args.seed, device, partial(advance, bar)))
            print(f'{name}: {fits[-1].test_accuracy[-1]:.2f} % of the held-out images after {fits[-1].seconds:.0f} s')
            save(fits[-1], folder / name, data.classes)
        write_results(folder / RESULTS, fits)

        # from here on as anybody would who was given the folder
        loaded = timm.create_model(f'local-dir:{folder / shown}', pretrained=True)
        config = timm.data.resolve_model_data_config(loaded)
        probabilities = predict(loaded, data, config, device)
        trained = next(f for f in fits if f.name == shown)
        before = predict(trained.model, data, trained.data_config, device)
        if not torch.equal(probabilities.argmax(1), before.argmax(1)):
            raise RuntimeError(f'{shown} predicts otherwise after saving and loading')
        picked = pick(data.test.targets, probabilities)
        draw(folder / PICTURE, fits, data, shown, probabilities, picked)

    print()
    print_table(
        [
            (f.name, f'{f.parameters:,}', f'{f.test_loss[-1]:.4f}', f'{f.test_accuracy[-1]:.2f} %', f'{f.seconds:.0f}')
            for f in fits
        ]
    )
    print(f"""
Loss and accuracy are of the held-out images, after the last epoch. {shown} was loaded again from its folder:
    timm.create_model('local-dir:{args.out / shown}', pretrained=True)
It predicts the same as before for all {len(data.test)} of them. Some of them, and some it is least sure of:""")
    for index in (*picked[0][:5], *picked[1][:5]):
        confidence, predicted = probabilities[index].max(0)
        print(
            f'    image {index}: {data.classes[predicted]} ({100 * confidence:.1f} %), '
            f'labelled {data.classes[data.test.targets[index]]}'
        )
    print(f'The training curves and more of the images: {args.out / PICTURE}')


if __name__ == '__main__':
    run(main)
