//! The E-model (ITU-T G.107): estimates a mean opinion score from delay and concealment. It is a
//! planning tool's estimate of what listeners would say, not a measurement.
//!
//! R = R0 - Idd - Ie,eff: all other impairments of a telephone (echo, noise, loudness) are left at
//! the Recommendation's defaults, or at none.

use std::time::Duration;

/// G.107 with all parameters at their defaults: 93.2.
const R_DEFAULT: f64 = 93.2;

/// Equipment impairment (Ie) and packet loss robustness (Bpl) of Opus. G.113 has no values for it.
/// Without loss, from 24 kb/s on, Opus is no worse than G.711 (Ie 0). Bpl 10 is what the
/// open-source estimator rtcscore takes for Opus without forward error correction, and G.113's
/// value for GSM-EFR.
const OPUS_IE: f64 = 0.0;
const OPUS_BPL: f64 = 10.0;

/// Lookahead of the Opus encoder (RFC 6716, section 2).
const OPUS_LOOKAHEAD: Duration = Duration::from_micros(6_500);

/// Delay below which there is no impairment (G.107, 7.4).
const HARMLESS_DELAY: Duration = Duration::from_millis(100);

/// Returns the score of one Opus stream, from 1 to 4.5, in thousandths. `mouth_to_ear` runs from
/// the end of a frame's recording, when it may be sent, to its playout. `concealed` is the
/// concealed share (0..=1), treated as random loss.
pub fn opus_mos_thousandths(mouth_to_ear: Duration, frame: Duration, concealed: f64) -> u64 {
    let delay = mouth_to_ear + frame + OPUS_LOOKAHEAD;
    let r = R_DEFAULT - delay_impairment(delay) - loss_impairment(concealed * 100.0);
    (mos(r) * 1_000.0).round() as u64
}

/// Returns Idd (G.107, equations 7-27 and 7-28).
fn delay_impairment(delay: Duration) -> f64 {
    if delay <= HARMLESS_DELAY {
        return 0.0;
    }
    let x = (delay.as_secs_f64() / HARMLESS_DELAY.as_secs_f64()).log2();
    25.0 * ((1.0 + x.powi(6)).powf(1.0 / 6.0) - 3.0 * (1.0 + (x / 3.0).powi(6)).powf(1.0 / 6.0)
        + 2.0)
}

/// Returns Ie,eff (G.107, equation 7-29) at a burst ratio of 1.
fn loss_impairment(per_cent: f64) -> f64 {
    OPUS_IE + (95.0 - OPUS_IE) * per_cent / (per_cent + OPUS_BPL)
}

/// Converts R to a mean opinion score (G.107, Annex B).
fn mos(r: f64) -> f64 {
    match r {
        r if r <= 0.0 => 1.0,
        r if r >= 100.0 => 4.5,
        // The cubic dips below 1 for the smallest R.
        r => (1.0 + 0.035 * r + r * (r - 60.0) * (100.0 - r) * 7e-6).max(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_those_of_the_recommendation() {
        // G.107, Annex B, table B.1: R of 90, 80, 70, 60, 50.
        for (r, expected) in [
            (90.0, 4.34),
            (80.0, 4.03),
            (70.0, 3.60),
            (60.0, 3.10),
            (50.0, 2.58),
        ] {
            assert!((mos(r) - expected).abs() < 0.01, "{r}: {}", mos(r));
        }
        assert_eq!((mos(-5.0), mos(3.0), mos(120.0)), (1.0, 1.0, 4.5));
        // The default connection: 4.41.
        assert_eq!(
            opus_mos_thousandths(Duration::from_millis(40), Duration::from_millis(20), 0.0),
            4_409
        );
    }

    #[test]
    fn delay_and_loss_each_make_it_worse() {
        let score = |millis, share| {
            opus_mos_thousandths(
                Duration::from_millis(millis),
                Duration::from_millis(20),
                share,
            )
        };
        assert_eq!(score(10, 0.0), score(70, 0.0));
        for (better, worse) in [(100, 200), (200, 400), (400, 800)] {
            assert!(score(better, 0.0) > score(worse, 0.0));
        }
        for (better, worse) in [(0.0, 0.01), (0.01, 0.05), (0.05, 0.3)] {
            assert!(score(50, better) > score(50, worse));
        }
        // Calculated by hand from the equations.
        for (millis, idd) in [(100, 0.0), (250, 8.92), (400, 24.07)] {
            assert!(
                (delay_impairment(Duration::from_millis(millis)) - idd).abs() < 0.01,
                "{millis} ms"
            );
        }
        assert!((loss_impairment(10.0) - 47.5).abs() < 1e-9);
        assert!((1_000..1_700).contains(&score(50, 0.5)));
    }
}
