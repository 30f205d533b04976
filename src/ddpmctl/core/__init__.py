"""Diffusion itself: torch only, no files, no printing, no configuration.

Notation, used everywhere:

=============  ===============  =======================  =====================================================
symbol         name in code     shape                    meaning
=============  ===============  =======================  =====================================================
T              ``timesteps``    int                      number of noising steps
t              ``t``            int or (B,)              noise level 0..T; 0 is the clean image, T is noise
beta_t         ``betas``        (T+1,) float64           variance added by step t; beta_0 = 0
alpha_t        ``alphas``       (T+1,) float64           1 - beta_t
abar_t         ``alpha_bar``    (T+1,) float64           product of alpha up to t; abar_0 = 1
lambda_t       ``lam``          (T+1,) float64           log(sqrt(abar) / sqrt(1 - abar)); infinite at t = 0
x_0, x_t       ``x0``, ``x_t``  (B, C, H, W) in [-1, 1]  clean and noised images, float32
eps            ``eps``          (B, C, H, W)             the Gaussian noise that made x_t
v              ``v``            (B, C, H, W)             sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022)
s              ``s``            int                      the level that a sampling step goes to, s < t
=============  ===============  =======================  =====================================================

The network is fed the index t - 1 (0..T-1), as Ho et al. 2020 and every published DDPM checkpoint do; that
subtraction stands in :class:`ddpmctl.core.denoiser.Denoiser` alone.
"""
