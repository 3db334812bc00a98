import java.util.List;
import java.util.Map;
import org.codelibs.opensearch.runner.OpenSearchRunner;

/** One OpenSearch node on 127.0.0.1 until SIGTERM: {@code java -cp 'jars/*' OpenSearchNode.java PORT FOLDER}. */
public class OpenSearchNode {
    public static void main(String[] arguments) throws Exception {
        String port = arguments[0];
        String folder = arguments[1];
        Map<String, String> settings = Map.of(
                "http.port", port,
                "transport.port", "0",
                "network.host", "127.0.0.1",
                "discovery.type", "single-node",
                "path.repo", folder + "/repo",
                "action.destructive_requires_name", "false",
                // A test machine's full disk would make every index read-only.
                "cluster.routing.allocation.disk.threshold_enabled", "false");
        // The runner's own list leaves out "ingest", without which pipelines answer 400.
        List<String> roles = List.of("cluster_manager", "data", "ingest", "remote_cluster_client");

        OpenSearchRunner runner = new OpenSearchRunner();
        runner.setMaxHttpPort(-1); // else it refuses ports above 9299
        runner.onBuild((number, builder) -> {
            settings.forEach(builder::put);
            builder.putList("node.roles", roles);
        });
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                runner.close();
            } catch (Exception error) {
                error.printStackTrace();
            }
        }));
        runner.build(OpenSearchRunner.newConfigs().clusterName("bridge-tests").numOfNode(1).basePath(folder));
        Thread.currentThread().join();
    }
}
