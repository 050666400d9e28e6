"""GPUs, and what a number of FLOPs costs on them: hours, rent, energy and CO2.

    GPU-hours = C / (peak FLOP/s x MFU x 3600)        kWh = GPU-hours x kW x PUE        CO2 = kWh x kg per kWh

MFU, the model FLOPs utilisation, is the share of the peak that is reached. PUE, the power usage
effectiveness, is the power of a data centre over that of its computers. Units: C FLOPs, power watts, prices
US dollars.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU: its peak, its power and its price."""

    name: str
    peak: float  # FLOP/s of dense bf16 matrix products, float32 accumulation
    watts: float  # thermal design power, the board's limit
    price: float | None = None  # dollars an hour


# Peaks and watts are from each maker's data sheet. Prices are on demand, of May 2026: the middle of the range
# that mercatus-ai.com/blog/cloud-gpu-pricing gives for specialised clouds (A100 1.10-1.50, H100 2.50-3.50,
# H200 3.50-4.50 dollars; over all clouds 0.80-3.00, 1.99-5.00, 2.50-7.00); B200: Spheron, 17 March 2026. No
# price was found for the others, and none is guessed.
DEVICES = {
    "v100": Device("NVIDIA V100 SXM2", 125e12, 300),  # fp16: it has no bf16
    "a100": Device("NVIDIA A100 SXM 80GB", 312e12, 400, 1.30),
    "l40s": Device("NVIDIA L40S", 362e12, 350),
    "rtx4090": Device("NVIDIA RTX 4090", 165.2e12, 450),  # Ada whitepaper, appendix A
    "h100": Device("NVIDIA H100 SXM", 989e12, 700, 3.00),
    "h200": Device("NVIDIA H200 SXM", 989e12, 700, 4.00),
    "b200": Device("NVIDIA B200", 2250e12, 1000, 6.03),
    "mi300x": Device("AMD Instinct MI300X", 1307e12, 750),
}
DEFAULT_MFU = 0.4  # the GPU-hours of Llama 2 (Touvron et al. 2023, table 2) imply 0.38 to 0.43
# Touvron et al. 2023 (LLaMA, arXiv 2302.13971), section 6; the model card of Llama 2 counts in the same way.
PUE = 1.1
CO2 = 0.385  # kg per kWh, the average of the USA


def gpu_hours(C: float, device: Device, mfu: float = DEFAULT_MFU) -> float:
    """Return the hours of one device for C = 6 N D FLOPs.

    mfu: the share of the peak FLOP/s that goes into 6 N D. The MFU of Chowdhery et al. 2022, appendix B,
    counts attention as well."""
    return C / (device.peak * mfu * 3600)


def energy(hours: float, watts: float) -> float:
    """Return the kWh of so many GPU-hours at full power, without the hosts' CPUs and network."""
    return hours * watts / 1000 * PUE


def hardware_cost(C: float, device: Device, gpus: int, mfu: float, price: float | None) -> dict:
    """Return time, rent, energy and CO2 of C FLOPs on `gpus` devices. price: dollars an hour of each."""
    hours = gpu_hours(C, device, mfu)
    kwh = energy(hours, device.watts)
    return {
        "name": device.name,
        "gpu_hours": hours,
        "days": hours / gpus / 24,
        "price": price,
        "dollars": None if price is None else price * hours,
        "kwh": kwh,
        "co2_kg": kwh * CO2,
    }


def check_mfu(mfu: float) -> None:
    """Raise ValueError unless mfu is from 0.0001 to 1."""
    if not 1e-4 <= mfu <= 1:
        raise ValueError(f"mfu {mfu:g}: expected a share of the peak, from 0.0001 to 1, such as 0.4")
