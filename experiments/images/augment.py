"""Augmentation on the device, inside the compiled step."""

import jax
import jax.numpy as jnp


def augment(
    key: jax.Array, images: jax.Array, *, shift: int = 0, flip: bool = False
) -> jax.Array:
    """Shifts and flips every image at random.

    Args:
      key: PRNG key.
      images: (batch, height, width, channels), of any dtype; zero is the background.
      shift: up to this many pixels in each direction; what moves in is zero.
      flip: whether to mirror half of the images, left and right.

    Returns:
      Images like ``images``.
    """
    shift_key, flip_key = jax.random.split(key)
    if shift:
        images = _shift(shift_key, images, shift)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def _shift(key: jax.Array, images: jax.Array, shift: int) -> jax.Array:
    count, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    offsets = jax.random.randint(key, (count, 2), 0, 2 * shift + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        corner = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, corner, (height, width, channels))

    return jax.vmap(crop)(padded, offsets)
