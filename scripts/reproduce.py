"""Train a grid of models x options x seeds under one protocol, and tabulate, compare and plot what comes out.

    python scripts/reproduce.py --dataset digits --image-size 16 --crop-padding 2 --protocol modern --epochs 20 \\
        --models cifar_resnet20 cifar_seresnet20 cifar_senetv2_resnet20 --seeds 0 1 2 3 4 --out output/digits

A model is a timm name, with options after a colon: cifar_senetv2_resnet20:sae_cardinality=2,sae_reduction=8. Values are
Python literals; values parted by | make a grid: 'cifar_senetv2_resnet20:sae_cardinality=1|2|4|8,sae_reduction=8|16|32'.

It starts from scratch, or, after an @, from the weights of --init:
  MODEL@keep           weights of the same architecture, tested as they are
  MODEL@continue       weights of the same architecture
  MODEL@lift           weights with SE, into a model with SaE in the same places and more hidden units
  MODEL@add_attention  weights without attention; then SaE is added, reduction=32,cardinality=4 unless given. Before
                       loading its saved weights build MODEL and add attention again: timm has no name for the two
  MODEL@scratch        as without @, to be given what follows
A classifier for other classes is new. Of one model's training may be given after another colon, as in
'cifar_senetv2_resnet20@lift:attention_lr=1|10':
  epochs=N, lr=X           in place of the grid's
  train_only=attention     all else stays as it is, but for a new classifier; norms keep their statistics
  attention_lr=X           learning rate of the attention layers, as a multiple
  fresh_init=kaiming       start of the hidden units that @lift adds: He's normal distribution in their rows of fc1;
             small         small numbers in place of zeros in their columns of fc2, so that logits change a little;
             copy          the source's rows of fc1 again, and a tenth of fresh ones
  fresh_lr=X               of the hidden units that @lift adds, as a multiple, with an optimizer whose steps are
                           proportional to the learning rate (sgd, adam, adamw, ...)

Protocols (a number that has an option below can be overridden by it):
  seanet    the SEANet authors': SGD, momentum 0.9, lr 0.1, weight decay 1e-4 on all parameters, batch 64, 200 epochs,
            lr x 0.1 every 80 epochs
  senetv2   SENetV2's: Adam and cross-entropy; the paper leaves the rest unstated, here Keras' lr of 0.001, batch 64,
            100 epochs
  modern    for few epochs: SGD with Nesterov momentum 0.9, lr 0.1 risen to over a fifth of the epochs, then cosine,
            weight decay 5e-4 (norms and biases exempt), label smoothing 0.1, batch 128, 10 epochs
Each augments by random crop (padding 4) and horizontal flip (not for digits). Before that the images of a folder are
resized and cropped to the input's size as timm evaluates ResNets (bicubic, 0.875), whatever the model. Images that do
not fill the last batch of an epoch wait for another epoch.

In --out, a new folder or one of this script: results.csv (a row a run), curves.csv (a row an epoch), table.md,
accuracy_vs_parameters.png, curves.png. Accuracies are in percent of the test images: `accuracy` after the last epoch,
`best_accuracy` that of the best epoch on the test images, which is what the papers report and is optimistic. Killed at
any moment and started again with the same arguments, it goes on at the last finished epoch and repeats no finished run.
One process at a time writes to a folder.

With --ray the runs are made side by side, on this machine or on a cluster: see docs/many-machines.md.
"""

# The rest is imported in main(), after the arguments: --help needs no patience
import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone's packages, whatever is installed

from timm_senetv2.commands import Parser  # noqa: E402
from timm_senetv2.errors import UserError, run  # noqa: E402


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        '--models', nargs='+', required=True, metavar='MODEL[:KEY=VALUE,...][@START[:...]]', help='models to train'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], metavar='N', help='seeds (default: 0)')
    parser.add_argument('--baseline', metavar='MODEL', help='model the others are compared with (default: the first)')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the results')
    parser.add_argument(
        '--init',
        metavar='DIR|NAME.TAG',
        help='trained weights to start from: a folder OUT/weights/RUN of --save-weights, or a model of timm with its '
        'tag, such as cifar_resnet20.fmnist',
    )
    parser.add_argument(
        '--dataset',
        required=True,
        metavar='NAME|DIR',
        help='digits, fashion-mnist, cifar10, cifar100, or an image folder',
    )
    parser.add_argument('--data-dir', metavar='DIR', help='where the data set is, or is downloaded to')
    parser.add_argument('--no-download', action='store_true', help='fail where the data set is not there')
    parser.add_argument('--limit', type=int, metavar='N', help='use only N training and N test images')
    parser.add_argument(
        '--per-class', type=int, metavar='N', help='train on only N images of each class, others for each seed'
    )
    parser.add_argument(
        '--epoch-repeats',
        type=int,
        metavar='N',
        help='passes over the training images in one epoch, after which it is tested: for few images (default: 1)',
    )
    parser.add_argument('--image-size', type=int, metavar='N', help="side of the input (default: the model's)")
    parser.add_argument(
        '--workers', type=int, default=4, metavar='N', help='processes that read an image folder (default: 4)'
    )
    parser.add_argument(
        '--save-weights',
        action='store_true',
        help="write each run's final weights to OUT/weights/RUN, which timm loads as local-dir:OUT/weights/RUN",
    )
    parser.add_argument(
        '--measure-fresh',
        action='store_true',
        help='write fresh.csv and fresh.png: what the hidden units that @lift adds do, by epoch',
    )
    parser.add_argument(
        '--step-time',
        action='store_true',
        help='at the end time a step of training and of inference of each model, in turn; on a machine that does '
        'nothing else; writes step_times.csv and accuracy_vs_cost.png',
    )
    parser.add_argument('--keep-checkpoints', action='store_true', help='keep the checkpoints of finished runs')

    protocol = parser.add_argument_group('protocol')
    protocol.add_argument(
        '--protocol', default='modern', metavar='NAME', help='seanet, senetv2, modern (default: modern)'
    )
    protocol.add_argument('--epochs', type=int, metavar='N')
    protocol.add_argument('--batch-size', type=int, metavar='N')
    protocol.add_argument('--opt', metavar='NAME', help="an optimizer of timm's")
    protocol.add_argument('--lr', type=float, metavar='X')
    protocol.add_argument('--weight-decay', type=float, metavar='X')
    protocol.add_argument('--sched', choices=('cosine', 'step', 'none'))
    protocol.add_argument('--label-smoothing', type=float, metavar='X')
    protocol.add_argument(
        '--crop-padding',
        type=int,
        default=4,
        metavar='N',
        help='pixels of black around an image before the random crop (default: 4)',
    )
    protocol.add_argument(
        '--hflip',
        action=argparse.BooleanOptionalAction,
        default=None,
        help='horizontal flip (default: on, for digits off)',
    )
    protocol.add_argument(
        '--ema-decay', type=float, metavar='X', help='evaluate the moving average of the weights, with this decay'
    )

    machine = parser.add_argument_group('machine')
    machine.add_argument('--device', choices=('cpu', 'cuda'), help='(default: cuda where there is one)')
    machine.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        choices=('bfloat16', 'float16'),
        help='mixed precision (bfloat16 unless float16 is named)',
    )
    machine.add_argument('--channels-last', action='store_true', help='channels-last memory format')
    machine.add_argument('--compile', action='store_true', help='torch.compile the model')

    ray = parser.add_argument_group('runs side by side')
    ray.add_argument(
        '--ray',
        nargs='?',
        const='local',
        metavar='auto|HOST:PORT',
        help='make the runs as tasks of Ray: on the cluster at HOST:PORT, on the one that runs here (auto), or with no '
        'value on one of its own on this machine; the rows are the same as without',
    )
    ray.add_argument(
        '--cpus-per-run',
        type=int,
        metavar='N',
        help='cores that Ray sets aside for a run (default: as many as torch has threads, which OMP_NUM_THREADS sets; '
        '1 on a GPU)',
    )
    ray.add_argument(
        '--gpus-per-run', type=float, metavar='X', help='GPUs that Ray sets aside for a run, such as 0.5 (default: 1)'
    )
    ray.add_argument(
        '--max-retries',
        type=int,
        metavar='N',
        help='how often a run is tried again after its worker or its node has died (default: 3)',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    args = parse_args(argv)
    command = command or shlex.join(['python', 'scripts/reproduce.py', *(sys.argv[1:] if argv is None else argv)])

    from experiments.grid import Job, one_after_the_other, reproduce
    from experiments.settings import make_settings

    chosen = {key: getattr(args, key) for key in ('cpus_per_run', 'gpus_per_run', 'max_retries')}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if args.ray is None and chosen:
        raise UserError(f'--{next(iter(chosen)).replace("_", "-")} has a meaning with --ray only')
    if args.device is None and 'gpus_per_run' in chosen:
        args.device = 'cuda' if chosen['gpus_per_run'] else 'cpu'
    settings = make_settings(vars(args), trained_here=args.ray is None)
    executor = one_after_the_other
    if args.ray is not None:
        from experiments.ray_executor import on_ray

        executor = on_ray(args.ray, settings.device, **chosen)
    if not args.out:
        raise UserError('--out needs the name of a folder')
    job = Job(
        settings=settings,
        out=Path(args.out),
        command=command.encode(errors='backslashreplace').decode(),
        data_dir=args.data_dir,
        download=not args.no_download,
        workers=args.workers,
        init=args.init,
        save_weights=args.save_weights,
        keep_checkpoints=args.keep_checkpoints,
        measure_fresh=args.measure_fresh,
        step_time=args.step_time,
    )
    print(reproduce(args.models, args.seeds, job, args.baseline, executor))


if __name__ == '__main__':
    run(main)
