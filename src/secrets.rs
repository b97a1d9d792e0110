//! Secrets: ICE credentials, API secrets, tokens. Whoever guesses one can take somebody's place.
//!
//! A process draws them from the system's generator. A simulation passes in a keyed generator
//! instead, so that its runs repeat. What is not secret (ids, SSRCs, first sequence numbers, the
//! chances of a scenario) comes from [`crate::seeded`], and no seed reaches a secret.

use std::fmt;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

/// Letters that need no quoting in any protocol. All are ice-chars (RFC 8839, section 5.4).
const LETTERS: &[u8; 52] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A generator whose past and future draws cannot be computed from known draws.
pub struct Secrets(SecretSource);

enum SecretSource {
    System(SystemRandom),
    /// HMAC-SHA256 of a counter.
    Keyed {
        key: hmac::Key,
        drawn: u64,
    },
}

impl Secrets {
    /// Makes the system's generator: the only one for a process that others can reach.
    pub fn system() -> Secrets {
        Secrets(SecretSource::System(SystemRandom::new()))
    }

    /// Makes a generator for simulations, never for a network: one seed gives one sequence. The
    /// draws do not reveal the seed, but there are few seeds and all can be tried.
    pub fn keyed_for_tests(seed: u64) -> Secrets {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &seed.to_be_bytes());
        Secrets(SecretSource::Keyed { key, drawn: 0 })
    }

    /// Draws `N` random bytes.
    ///
    /// # Panics
    /// If the system has no random numbers, because then no secret is safe.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        match &mut self.0 {
            SecretSource::System(system) => system
                .fill(&mut bytes)
                .expect("the system gives random numbers"),
            SecretSource::Keyed { key, drawn } => {
                for block in bytes.chunks_mut(32) {
                    *drawn += 1;
                    let tag = hmac::sign(key, &drawn.to_be_bytes());
                    block
                        .iter_mut()
                        .zip(tag.as_ref())
                        .for_each(|(byte, from)| *byte = *from);
                }
            }
        }
        bytes
    }

    /// Draws a text of `count` letters, 5.7 bits each. All letters are equally likely.
    pub fn letters(&mut self, count: usize) -> String {
        /// The largest multiple of the number of letters that a byte holds. Bytes from there on
        /// would favour the first letters.
        const EVEN: u8 = (256 / LETTERS.len() * LETTERS.len()) as u8;
        let mut text = String::with_capacity(count);
        while text.len() < count {
            let bytes = self.bytes::<32>();
            let even = bytes.iter().filter(|byte| **byte < EVEN);
            let letters = even.map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]));
            text.extend(letters.take(count - text.len()));
        }
        text
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(..)")
    }
}

/// Returns a secret as it was meant. Files and variables that hold one often end with a newline,
/// begin with a byte order mark, or have quotes around it, as in a `.env` file. None of these is
/// part of a key, a secret or a token.
pub fn cleaned(text: &str) -> &str {
    let is_around = |c: char| c.is_whitespace() || matches!(c, '\u{FEFF}' | '\u{200B}');
    let text = text.trim_matches(is_around);
    let unquoted = ['"', '\''].into_iter().find_map(|quote| {
        let inner = text.strip_prefix(quote)?.strip_suffix(quote)?;
        (!inner.contains(quote)).then_some(inner)
    });
    unquoted.map_or(text, |inner| inner.trim_matches(is_around))
}

/// A text that is never printed: `Debug` and `Display` show `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// Returns the text itself, for the one place that sends it or signs with it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Returns `text` without this secret. A LiveKit server repeats the whole token when it refuses
    /// one.
    pub fn redact(&self, text: &str) -> String {
        if self.0.is_empty() {
            text.to_owned()
        } else {
            text.replace(&self.0, "***")
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Secret {
        Secret(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_repeats_its_secrets_and_the_system_does_not() {
        let drawn = |mut secrets: Secrets| (secrets.letters(40), secrets.bytes::<70>());
        assert_eq!(
            drawn(Secrets::keyed_for_tests(1)),
            drawn(Secrets::keyed_for_tests(1))
        );
        assert_ne!(
            drawn(Secrets::keyed_for_tests(1)),
            drawn(Secrets::keyed_for_tests(2))
        );
        assert_ne!(drawn(Secrets::system()), drawn(Secrets::system()));
    }

    #[test]
    fn every_letter_comes_as_often_as_the_others() {
        let mut secrets = Secrets::keyed_for_tests(7);
        let text = secrets.letters(52 * 1_000);
        assert_eq!(text.len(), 52_000);
        for letter in LETTERS {
            let times = text.bytes().filter(|byte| byte == letter).count();
            // Five standard deviations of 1,000.
            assert!((840..=1_160).contains(&times), "{letter}: {times}");
        }
    }

    #[test]
    fn what_editors_and_env_files_put_around_a_secret_is_no_part_of_it() {
        for text in [
            "s3cret",
            "\u{FEFF}s3cret",
            " s3cret\r\n",
            "\"s3cret\"",
            "'s3cret'\n",
            "\u{FEFF}\"s3cret\"\r\n",
            "\" s3cret \"",
        ] {
            assert_eq!(cleaned(text), "s3cret", "{text:?}");
        }
        for whole in ["s3c\"ret", "\"", "'s3cret", "\"a\"b\"", "s3cret=="] {
            assert_eq!(cleaned(whole), whole);
        }
        assert_eq!(cleaned("\"\""), "");
    }

    #[test]
    fn what_is_drawn_is_not_printed() {
        assert_eq!(format!("{:?}", Secrets::keyed_for_tests(3)), "Secrets(..)");
    }

    /// The keyed generator would be a vulnerability outside tests: nothing in the program may make
    /// one.
    #[test]
    fn only_tests_have_a_keyed_generator() {
        let name = concat!("keyed_for", "_tests");
        let mut directories = vec![std::path::PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src"
        ))];
        let mut seen = 0;
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                let program = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                let calls = program.matches(name).count();
                seen += usize::from(calls > 0);
                let allowed = path.ends_with("tests.rs") || path.ends_with("src/secrets.rs");
                assert!(calls == 0 || allowed, "{}: {name}", path.display());
            }
        }
        assert!(seen > 0, "the place that makes it is seen");
    }
}
