//! Certificates and pre-shared keys for tests, made by the tools that users make theirs with.
//! Included by the tests of several crates; needs nothing but the standard library.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program that makes certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    Certtool,
    Openssl,
}

impl Maker {
    pub const ALL: [Self; 2] = [Self::Certtool, Self::Openssl];

    /// The name of the program.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Certtool => "certtool",
            Self::Openssl => "openssl",
        }
    }

    /// Is it installed?
    pub fn is_installed(self) -> bool {
        let mut command = Command::new(self.program());
        command.arg(match self {
            Self::Certtool => "--version",
            Self::Openssl => "version",
        });
        command.stdin(Stdio::null()).output().is_ok_and(|output| output.status.success())
    }
}

/// Whose certificate it is; the files have the names QEMU and libnbd look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `server-cert.pem`, `server-key.pem`.
    Server,
    /// `client-cert.pem`, `client-key.pem`.
    Client,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    Now,
    /// Until the end of January 2020.
    Expired,
}

/// An authority that signs certificates: `ca-cert.pem` and `ca-key.pem` in a directory.
#[derive(Debug)]
pub struct Authority {
    maker: Maker,
    directory: PathBuf,
}

impl Authority {
    /// Makes an authority in an existing directory.
    pub fn new(maker: Maker, directory: &Path, name: &str) -> Self {
        let authority = Self { maker, directory: directory.to_path_buf() };
        let (key, certificate) = (authority.path("ca-key.pem"), authority.path("ca-cert.pem"));
        make_key(maker, &key);
        match maker {
            Maker::Certtool => {
                let template = authority.path("ca.template");
                let text = format!("cn = \"{name}\"\nca\ncert_signing_key\ncrl_signing_key\n");
                write(&template, &text);
                run(Command::new("certtool")
                    .arg("--generate-self-signed")
                    .arg("--load-privkey")
                    .arg(&key)
                    .arg("--template")
                    .arg(&template)
                    .arg("--outfile")
                    .arg(&certificate));
            }
            Maker::Openssl => run(Command::new("openssl")
                .args(["req", "-x509", "-new", "-batch", "-days", "2", "-subj"])
                .arg(format!("/CN={name}"))
                .arg("-key")
                .arg(&key)
                .arg("-out")
                .arg(&certificate)),
        }
        authority
    }

    /// The authority that was made in this directory.
    pub fn existing(maker: Maker, directory: &Path) -> Self {
        Self { maker, directory: directory.to_path_buf() }
    }

    /// Certificate and key, for `O=Example, CN=name`, and a copy of the authority's own
    /// certificate, in a directory that is made if need be. A server's is for `name`, 127.0.0.1 and
    /// `::1`.
    pub fn issue(&self, role: Role, name: &str, validity: Validity, directory: &Path) {
        std::fs::create_dir_all(directory).expect("a directory");
        let key = directory.join(format!("{}-key.pem", role.name()));
        let certificate = directory.join(format!("{}-cert.pem", role.name()));
        make_key(self.maker, &key);
        match self.maker {
            Maker::Certtool => self.issue_with_certtool(role, name, validity, &key, &certificate),
            Maker::Openssl => self.issue_with_openssl(role, name, validity, &key, &certificate),
        }
        if directory != self.directory {
            std::fs::copy(self.path("ca-cert.pem"), directory.join("ca-cert.pem")).expect("a copy");
        }
    }

    fn issue_with_certtool(
        &self,
        role: Role,
        name: &str,
        validity: Validity,
        key: &Path,
        certificate: &Path,
    ) {
        let template = certificate.with_extension("template");
        let mut text = format!("organization = \"Example\"\ncn = \"{name}\"\nsigning_key\n");
        text.push_str(&match role {
            Role::Server => format!(
                "tls_www_server\nencryption_key\ndns_name = \"{name}\"\nip_address = \"127.0.0.1\"\n\
                 ip_address = \"::1\"\n"
            ),
            Role::Client => "tls_www_client\nencryption_key\n".to_owned(),
        });
        if validity == Validity::Expired {
            text.push_str("activation_date = \"2020-01-01 00:00:00\"\n");
            text.push_str("expiration_date = \"2020-01-31 00:00:00\"\n");
        }
        write(&template, &text);
        run(self
            .certtool("--generate-certificate")
            .arg("--load-privkey")
            .arg(key)
            .arg("--template")
            .arg(&template)
            .arg("--outfile")
            .arg(certificate));
    }

    fn issue_with_openssl(
        &self,
        role: Role,
        name: &str,
        validity: Validity,
        key: &Path,
        certificate: &Path,
    ) {
        let request = certificate.with_extension("csr");
        run(Command::new("openssl")
            .args(["req", "-new", "-batch", "-subj"])
            .arg(format!("/O=Example/CN={name}"))
            .arg("-key")
            .arg(key)
            .arg("-out")
            .arg(&request));
        let settings = certificate.with_extension("cnf");
        let extensions = match role {
            Role::Server => format!(
                "extendedKeyUsage=serverAuth\nsubjectAltName=DNS:{name},IP:127.0.0.1,IP:::1\n"
            ),
            Role::Client => "extendedKeyUsage=clientAuth\n".to_owned(),
        };
        // `openssl x509` cannot date back; `openssl ca` can, and keeps a list of what it issued.
        let database = certificate.with_extension("index");
        write(&database, "");
        let text = format!(
            "[ca]\ndefault_ca=test\n[test]\ndatabase={}\nnew_certs_dir={}\nrand_serial=yes\n\
             default_md=sha256\npolicy=any\nunique_subject=no\n[any]\norganizationName=optional\n\
             commonName=optional\n[extensions]\nbasicConstraints=CA:FALSE\n{extensions}",
            database.display(),
            self.directory.display(),
        );
        write(&settings, &text);
        let (from, until) = match validity {
            Validity::Now => ("20200101000000Z", "20490101000000Z"),
            Validity::Expired => ("20200101000000Z", "20200131000000Z"),
        };
        run(Command::new("openssl")
            .args(["ca", "-batch", "-notext", "-extensions", "extensions", "-startdate", from])
            .args(["-enddate", until, "-config"])
            .arg(&settings)
            .arg("-cert")
            .arg(self.path("ca-cert.pem"))
            .arg("-keyfile")
            .arg(self.path("ca-key.pem"))
            .arg("-in")
            .arg(&request)
            .arg("-out")
            .arg(certificate));
    }

    /// Writes a list with one revoked certificate. Needs certtool, whatever made the certificate.
    pub fn revoke(&self, certificate: &Path, list: &Path) {
        let template = list.with_extension("template");
        write(&template, "crl_next_update = 2\ncrl_number = 1\n");
        run(self
            .certtool("--generate-crl")
            .arg("--load-certificate")
            .arg(certificate)
            .arg("--template")
            .arg(&template)
            .arg("--outfile")
            .arg(list));
    }

    fn certtool(&self, task: &str) -> Command {
        let mut command = Command::new("certtool");
        command.arg(task).arg("--load-ca-certificate").arg(self.path("ca-cert.pem"));
        command.arg("--load-ca-privkey").arg(self.path("ca-key.pem"));
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// Adds a user with a fresh key to a file of pre-shared keys, which is made if need be. Needs
/// psktool.
pub fn add_psk_user(file: &Path, user: &str) {
    run(Command::new("psktool").arg("-u").arg(user).arg("-p").arg(file));
}

/// A key in a file for nobody else. Certtool's is one for RSA: with others it cannot make
/// certificates that QEMU is content with.
fn make_key(maker: Maker, path: &Path) {
    match maker {
        Maker::Certtool => run(Command::new("certtool")
            .args(["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile"])
            .arg(path)),
        Maker::Openssl => run(Command::new("openssl")
            .args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"])
            .arg(path)),
    }
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("a file in a temporary directory");
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {errors}", output.status);
}
