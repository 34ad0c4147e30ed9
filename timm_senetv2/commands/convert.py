"""Convert a checkpoint into a folder that timm loads: weights as safetensors, and timm's config.

    timm-senetv2 convert best_model.pth --model seanet20 --out seanet20_cifar10
    python -c "import timm; timm.create_model('local-dir:seanet20_cifar10', pretrained=True)"

Reads the SEANet authors' CIFAR-10 and CIFAR-100 files (https://github.com/akhilesh-pandey/SEANet-pytorch), files of
unofficial PyTorch ports that store SaE as separate dense layers, checkpoints of timm's train.py, and plain state dicts.
The number of classes is that of the file. What timm's train.py recorded in it, options of the model and preprocessing,
holds for the folder too; --model NAME.TAG says of another file which tag's preprocessing it was trained with. Pickled
code in a file is never run.
"""

from collections.abc import Sequence
from pathlib import Path

from . import PROG, Parser, options


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog=f'{PROG} convert', description=__doc__)
    parser.add_argument('checkpoint', type=Path, help='.pth, .pt, .bin, .pth.tar or .safetensors file')
    parser.add_argument('--model', required=True, help='the model that the weights are of, such as seanet20')
    parser.add_argument('--ema', action='store_true', help='take the averaged weights of the checkpoint')
    options.add_model_kwargs(parser)
    parser.add_argument(
        '--out',
        required=True,
        type=Path,
        metavar='DIR',
        help='new folder for model.safetensors and config.json, or one that this command wrote and nobody changed',
    )
    args = parser.parse_args(argv)

    from safetensors import SafetensorError

    from ..catalog import config_of
    from ..checkpoints import save
    from ..create import from_checkpoint
    from ..errors import UserError, printable, why
    from ..files import check_output, output_folder

    check_output(args.out, 'convert')
    model, checkpoint = from_checkpoint(args.model, args.checkpoint, args.ema, options.model_kwargs(args.model_kwargs))
    try:
        with output_folder(args.out, 'convert') as folder:
            save(model, folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f'cannot write {printable(args.out)}: {why(e)}') from None

    print(f'layout: {checkpoint.layout}')
    if checkpoint.epoch is not None:
        print(f'epoch: {checkpoint.epoch}')
    if checkpoint.best_acc1 is not None:
        print(f'best accuracy in the file: {checkpoint.best_acc1:.2f} %')
    print(f'classes: {model.num_classes}')
    print(f'preprocessing: {options.preprocessing(config_of(model))}')
    print(f'parameters: {sum(p.numel() for p in model.parameters()):,}')
    print(f'wrote {args.out}; timm.create_model({f"local-dir:{args.out}"!r}, pretrained=True) loads it')
