//! Both handshake machines joined in memory: from the greeting to the transmission phase.

mod shared;

use bytes::BytesMut;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use nbd_proto::handshake::client::{
    Answer, AwaitStep, Awaiting, ClientHandshake, ClientStep, InfoRequest, OptionPhase,
};
use nbd_proto::handshake::server::{GoAnswer, Handshake, HandshakeStep, ServerConfig};
use nbd_proto::handshake::{ExportDescription, Negotiated};
use nbd_proto::wire::{MetaContextName, ReplyMode};

use shared::{MODES, export};

const CONFIG: ServerConfig = ServerConfig::new();

/// The two ends and the bytes in transit.
struct Pair {
    export: ExportDescription,
    server: Option<Handshake>,
    to_server: BytesMut,
    to_client: BytesMut,
    negotiated: Option<Negotiated>,
}

impl Pair {
    fn new(export: ExportDescription) -> Self {
        let mut to_client = BytesMut::new();
        let server = Some(Handshake::start(CONFIG, &mut to_client));
        Self { export, server, to_server: BytesMut::new(), to_client, negotiated: None }
    }

    /// The server processes its input and answers.
    fn serve(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        let out = &mut self.to_client;
        loop {
            let step = server.advance(&mut self.to_server, out);
            server = match step.expect("the client keeps to the protocol") {
                HandshakeStep::NeedsInput(server) => {
                    self.server = Some(server);
                    return;
                }
                HandshakeStep::Go(go) => match go.accept(&self.export, out) {
                    GoAnswer::Transmission(negotiated) => {
                        self.negotiated = Some(*negotiated);
                        return;
                    }
                    GoAnswer::BlockSizesRequired(server) => server,
                },
                HandshakeStep::MetaContext(meta) => meta.accept(&self.export.meta_contexts, out),
                _ => panic!("this client asks for nothing else"),
            };
        }
    }

    fn greet(&mut self) -> OptionPhase {
        let handshake = ClientHandshake::new();
        match handshake.advance(&mut self.to_client, &mut self.to_server) {
            Ok(ClientStep::Newstyle(phase)) => phase,
            other => panic!("{other:?}"),
        }
    }

    fn ask<A: Answer>(&mut self, awaiting: Awaiting<A>) -> A::Accepted {
        self.serve();
        match awaiting.advance(&mut self.to_client) {
            Ok(AwaitStep::Accepted(accepted)) => accepted,
            _ => panic!("this server refuses nothing"),
        }
    }

    /// The whole handshake, with one context where the mode has them.
    fn negotiate(&mut self, mode: ReplyMode, context: &[MetaContextName]) -> Negotiated {
        const LEGAL: &str = "the option may be sent here";
        let mut phase = self.greet();
        if mode == ReplyMode::Extended {
            let sent = phase.extended_headers(&mut self.to_server).expect(LEGAL);
            phase = self.ask(sent);
        } else if mode == ReplyMode::Structured {
            let sent = phase.structured_reply(&mut self.to_server).expect(LEGAL);
            phase = self.ask(sent);
        }
        if mode != ReplyMode::Simple {
            let sent = phase.set_meta_context("disk", context, &mut self.to_server).expect(LEGAL);
            phase = self.ask(sent).1;
        }
        let sent = phase.go("disk", InfoRequest::ALL, &mut self.to_server).expect(LEGAL);
        self.ask(sent).0
    }
}

fn handshake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("handshake");
    let context = [MetaContextName::base_allocation()];
    for (name, mode) in MODES {
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| {
                let mut pair = Pair::new(export());
                let negotiated = pair.negotiate(mode, &context);
                let size = pair.negotiated.as_ref().map(|negotiated| negotiated.size);
                assert_eq!(size, Some(negotiated.size));
                negotiated
            });
        });
    }
    group.finish();
}

criterion_group!(all, handshake);
criterion_main!(all);
