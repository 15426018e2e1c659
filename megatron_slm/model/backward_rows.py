"""Which rows the layers' backward products compute: all, or only those with a nonzero gradient."""

from megatron_slm.model.decoder import Decoder
from megatron_slm.ops.row_dropping import drop_unselected_rows
from megatron_slm.ops.row_skipping import skip_zero_gradient_rows


def follow_selection_in_backward(chunk: Decoder, rows: str, layers: str) -> None:
    """Apply selection.backward_rows to one pipeline chunk of a decoder.

    all                       nothing changes.
    last_layer                exact. The model's last layer, which only the chunk with the head has,
                              leaves rows of zero gradient out.
    every_layer_approximate   APPROXIMATE. Every layer gives unselected tokens no gradient at its
                              entry and leaves their rows out.

    ValueError with Transformer Engine's layers, whose products are its own.
    """
    if rows == "all":
        return
    if layers != "torch":
        raise ValueError(
            f"selection.backward_rows is {rows}, but this run would use Transformer Engine's "
            "layers, whose products cannot leave rows out; set device.layers: torch, or "
            "backward_rows: all"
        )
    if rows == "every_layer_approximate":
        drop_unselected_rows(chunk.decoder.layers)
        skip_zero_gradient_rows(chunk.decoder)
    elif chunk.post_process:
        skip_zero_gradient_rows(chunk.decoder.layers[-1])
